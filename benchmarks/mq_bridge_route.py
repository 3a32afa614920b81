"""mq-bridge from the outbox to the queue; run by the Python of the benchmark's own equipment."""

import os
import signal

from mq_bridge import Route

route = Route.from_config(
    {
        "input": {
            "mongodb": {
                "url": os.environ["MONGODB_URL"],
                "database": os.environ["MONGODB_DATABASE"],
                "collection": "outbox",
                "consume": os.environ["CONSUME"],
                "cursor_id": "benchmark",
            }
        },
        # its publisher asks for confirms, sends persistent messages, and notices what is unroutable
        "output": {
            "amqp": {
                "url": os.environ["RABBITMQ_URL"],
                "exchange": "events",
                "queue": "arrivals",
                "no_declare_queue": True,
            }
        },
        "batch_size": int(os.environ["BATCH_SIZE"]),
    }
)
signal.signal(signal.SIGTERM, lambda *_: route.stop())
route.start()
route.join()

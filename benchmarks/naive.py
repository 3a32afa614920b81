"""
The loop that everybody writes first: watch, publish, wait for the confirm, save the token.

Correct as far as it goes (nothing is lost, order is kept), and the measure of how little latency
is possible: nothing waits for anything else.
"""

import os
import signal
import sys
from contextlib import suppress
from typing import Any

import pika
from pymongo import MongoClient

from benchmarks.field import EXCHANGE, OUTBOX


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    client: MongoClient[dict[str, Any]] = MongoClient(os.environ["MONGODB_URL"], w="majority")
    database = client[os.environ["MONGODB_DATABASE"]]
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["RABBITMQ_URL"]))
    channel = connection.channel()
    channel.confirm_delivery()
    saved = database["tokens"].find_one({"_id": "naive"})
    only_inserts = [{"$match": {"operationType": "insert"}}]
    token = saved["token"] if saved else None
    with database[OUTBOX].watch(only_inserts, resume_after=token) as stream:
        for change in stream:
            event = change["fullDocument"]
            channel.basic_publish(
                EXCHANGE,
                event["routing_key"],
                event["payload"].encode(),
                pika.BasicProperties(message_id=event["_id"], type=event["type"], delivery_mode=2),
                mandatory=True,
            )
            token = {"$set": {"token": change["_id"]}}
            database["tokens"].update_one({"_id": "naive"}, token, upsert=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()

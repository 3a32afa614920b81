"""
The relay: tails the change stream of an outbox and publishes each event to RabbitMQ.

It knows outbox documents only, so it serves any application's outbox.
"""

"""
The workers that hand requests over to third parties, and the two that clean up behind them.

They meet the service and the relay in MongoDB and on RabbitMQ only.
"""

"""How a process lives: settings, logs, shutdown, MongoDB, RabbitMQ, retries."""

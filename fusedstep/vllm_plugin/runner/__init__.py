"""What runs in a worker process: the model runner and its windows."""

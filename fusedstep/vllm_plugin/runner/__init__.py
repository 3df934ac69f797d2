"""The worker process: the model runner and its windows."""

"""The only place that imports vLLM: scheduler, runner, worker and platform of fusedstep."""

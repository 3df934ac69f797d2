"""All of fusedstep on a GPU, equality and speed, in one call."""

"""Minutes of mixed load on a server: nothing lost, nothing left over."""

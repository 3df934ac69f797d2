"""The step operations: torch tensors in and out, one implementation per kind of device.

``types`` is the contract, ``reference`` its plain-torch truth, ``native`` the CPU's; ``dispatch``
picks one.
"""

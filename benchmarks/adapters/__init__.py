"""One adapter per engine: what the comparison asks of it, and the process it runs in.

Nothing here imports yunmin at module level but `yunmin_engine`: a peer runs under an interpreter of its own, which may
lack everything that its engine does not need itself.
"""

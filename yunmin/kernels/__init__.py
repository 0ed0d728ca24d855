"""Implementations of the selective scan; `yunmin.scan` chooses among them."""

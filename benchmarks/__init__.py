"""How fast the relay is, beside others on the same servers. `make bench`; README.md says how."""

"""Which expert sits in which slot: first maps, repairs after a loss, coverage."""

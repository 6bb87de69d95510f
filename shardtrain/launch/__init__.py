"""How a run starts, meets its peers, is watched, and ends."""

"""One process, well behaved: its files, threads and streams, and what it agrees with its peers."""

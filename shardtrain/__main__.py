"""`python -m shardtrain`."""

from shardtrain.cli import main

main()

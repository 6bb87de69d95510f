"""Where the metrics of a run go besides `metrics.jsonl`: each module here is one such place, named by `log.also`.

Its function `open_logger(run)` opens it; see `shardtrain.metrics.logger`.
"""

"""Pipeline parallelism: schedules, and the executor that runs them in one SPMD program."""

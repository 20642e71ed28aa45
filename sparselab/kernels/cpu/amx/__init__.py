"""Products of dense blocks in bfloat16 by the matrix unit of Intel CPUs (AMX)."""

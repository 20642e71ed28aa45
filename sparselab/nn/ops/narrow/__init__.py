"""Linear products with the weights of frozen layers, in bfloat16 or int8."""

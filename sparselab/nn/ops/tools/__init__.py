"""What tools of torch see of sparse products: graphs of `torch.fx`, counts of operations."""

"""Networks, a training program, and what it shows of batch normalization."""

"""Which data, how many steps and which learning rate, stage after stage."""

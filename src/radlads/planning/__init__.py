"""What a stage will need before a machine is rented for it: memory, hours, money. Computes nothing on a GPU."""

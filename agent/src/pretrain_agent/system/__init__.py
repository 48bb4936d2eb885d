"""Linux processes: init duties, parent-death signals, handles."""

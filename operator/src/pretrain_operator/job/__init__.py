"""The control loop of one job."""

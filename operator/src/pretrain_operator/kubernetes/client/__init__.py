"""Client of the API server: requests, informers, back-off."""

"""Model and inputs to a graph: ahead of time (``export``) or just in time (``dynamo``)."""

"""The command line. It shows what the API returns and holds no logic of its own."""

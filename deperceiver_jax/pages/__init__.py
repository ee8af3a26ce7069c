"""What the pages share, the report, the comparison and the app: their head, their style, their data."""

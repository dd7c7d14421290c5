"""From run folders to evidence: measurement files, and the tables in the documentation that are made of them."""

"""Who is calling: keys, principals, permissions, roles, origins."""

"""Networks: one configurable decoder, heads, policies; read from the formats that people have."""

"""The HTTP side: routes, wire types, server-sent events."""

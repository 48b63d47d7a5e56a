"""Which kernel configuration answers a problem on an architecture. Pure functions; nothing here touches a GPU."""

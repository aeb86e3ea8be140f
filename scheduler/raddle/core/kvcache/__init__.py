"""Which KV blocks the pool still holds, and where a lost rank's sequences continue."""

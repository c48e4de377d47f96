"""Published methods from query to scores, each a function over the parts beside this room."""

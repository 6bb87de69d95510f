"""The values of `data.type`: each module here is one, and its function `open_rows(request)` opens the rows."""

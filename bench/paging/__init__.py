"""The bench of expert paging: our pager, plain LRU and the page cache, on one disk."""

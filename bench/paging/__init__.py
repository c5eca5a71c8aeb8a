"""The paging bench: it compares our pager, plain LRU and the page cache on one disk."""

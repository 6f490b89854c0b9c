"""Pages and notebook views: one self-contained file each, text of users as text."""

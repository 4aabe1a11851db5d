"""A simulated Ascend: a stand-in for atc and for the Python module acl. It proves function, never speed."""

"""What a coordinator and its nodes say to each other, over a connection that may break."""

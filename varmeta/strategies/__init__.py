"""The objectives F_i and G_i, and how phi and eta are moved down them."""

"""What serving engines take: rules, exports, and how heads lie over their ranks."""

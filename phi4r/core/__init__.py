"""What every part uses: errors, files, console, run lock, optional packages."""

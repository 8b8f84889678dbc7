import ControlAPI

extension String {
  /// As it may be shown on a terminal, line by line.
  var visible: String { visible(keepsLines: true) }
}

/// Prints for people and scripts: every word of vxctl goes through here. Takes the place of the standard library's.
func print(_ text: String, terminator: String = "\n") { Swift.print(text.visible, terminator: terminator) }

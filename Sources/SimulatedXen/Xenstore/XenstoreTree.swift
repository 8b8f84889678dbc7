/// The contents of a Xenstore: a value, so that a transaction is a copy.
struct XenstoreTree {
  struct Node {
    var value: [UInt8] = []
    var children: [String: Node] = [:]
    /// Owner and permissions as on the wire: "n0" is dom0's, nobody else's.
    var permissions: [String] = ["n0"]
  }

  private var root = Node()

  /// - Parameter path: absolute, without a slash at its end.
  static func parts(_ path: String) -> [Substring] { path.split(separator: "/") }

  func node(_ path: String) -> Node? {
    var node = root
    for part in Self.parts(path) {
      guard let next = node.children[String(part)] else { return nil }
      node = next
    }
    return node
  }

  /// Changes a node, making it and those above it where they are missing.
  mutating func modify(_ path: String, _ change: (inout Node) -> Void) {
    Self.modify(&root, Self.parts(path)[...], change)
  }

  private static func modify(_ node: inout Node, _ parts: ArraySlice<Substring>, _ change: (inout Node) -> Void) {
    guard let first = parts.first else { return change(&node) }
    modify(&node.children[String(first), default: Node()], parts.dropFirst(), change)
  }

  /// - Returns: false when the node was not there.
  mutating func remove(_ path: String) -> Bool {
    Self.remove(&root, Self.parts(path)[...])
  }

  private static func remove(_ node: inout Node, _ parts: ArraySlice<Substring>) -> Bool {
    guard let first = parts.first.map(String.init) else { return false }
    if parts.count == 1 { return node.children.removeValue(forKey: first) != nil }
    guard var child = node.children[first] else { return false }
    let removed = remove(&child, parts.dropFirst())
    node.children[first] = child
    return removed
  }
}

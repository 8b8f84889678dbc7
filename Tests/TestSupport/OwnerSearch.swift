/// Looks through a value for what is not one: a function, or an object other than those that are named. By reflection: an optional that is nil, or an
/// array that is empty, shows by its type what it may hold, but not what is behind that. So who asks sees to it that there is something in them.
package struct OwnerSearch {
  /// Types of objects that may be met.
  private let counters: Set<String>
  /// What was found that may not be, with the way there.
  package private(set) var found: [String] = []
  /// Every type that was met.
  package private(set) var types: Set<String> = []

  package init(_ value: Any, counters: [Any.Type]) {
    self.counters = Set(counters.map { String(reflecting: $0) })
    look(value, "")
  }

  private mutating func look(_ value: Any, _ path: String) {
    guard isAllowed(type(of: value), path) else { return }
    // What cannot be copied, as atomics, has nothing to look at.
    for (index, child) in Mirror(reflecting: value).children.enumerated() {
      look(child.value, "\(path).\(child.label ?? "\(index)")")
    }
  }

  /// Whether a type is a struct, an enum, an optional or a tuple, or one of the compiler's own that these end with: not a function, nor an existential,
  /// which may be of any class. By the kind in its metadata (Swift's ABI, MetadataKind.def).
  private static func isValue(_ type: Any.Type) -> Bool {
    [0x200, 0x201, 0x202, 0x300, 0x301].contains(unsafeBitCast(type, to: UnsafePointer<UInt>.self).pointee)
  }

  private mutating func isAllowed(_ type: Any.Type, _ path: String) -> Bool {
    let name = String(reflecting: type)
    types.insert(name)
    let isOwner = type is AnyClass ? !counters.contains(name) : !Self.isValue(type)
    if isOwner { found.append("\(path): \(name)") }
    guard !isOwner, let container = type as? any Container.Type else { return !isOwner }
    return container.contained.allSatisfy { isAllowed($0, path) }
  }
}

private protocol Container {
  /// The types of what it may hold.
  static var contained: [Any.Type] { get }
}

extension Optional: Container { static var contained: [Any.Type] { [Wrapped.self] } }
extension Array: Container { static var contained: [Any.Type] { [Element.self] } }
extension Set: Container { static var contained: [Any.Type] { [Element.self] } }
extension Dictionary: Container { static var contained: [Any.Type] { [Key.self, Value.self] } }

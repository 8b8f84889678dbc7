/// A guest as operators name it, on the command line and in the API. One rule everywhere: `id:7` is a domain number and `name:web1` a name, whatever guests there are. A plain
/// word is a number if a domain has it, as with xl, and a name otherwise; a word that is the number of one domain and the name of another
/// is refused, because a command for one tenant's guest must not reach another's.
package struct GuestName: Equatable {
  package enum Meaning: Equatable {
    case number(UInt32)
    case name(String)
    case either(String)
  }

  /// A domain and its name, as vxd or Xenstore knows them.
  package struct Domain: Equatable {
    package var number: UInt32
    package var name: String

    package init(number: UInt32, name: String) {
      self.number = number
      self.name = name
    }
  }

  /// Why a guest cannot be told.
  package struct Ambiguous: Error, Equatable {
    package var message: String

    package init(message: String) { self.message = message }
  }

  /// What a word has to be, after "expected ...".
  package static let expected = "a guest: a name, name:NAME, or id:N with a domain number without leading zeros"

  package let text: String
  package let meaning: Meaning

  package init?(argument: String) {
    guard !argument.isEmpty else { return nil }
    text = argument
    if argument.hasPrefix("id:") {
      guard let number = Self.number(argument.dropFirst(3)) else { return nil }
      meaning = .number(number)
    } else if argument.hasPrefix("name:") {
      let name = String(argument.dropFirst(5))
      guard !name.isEmpty else { return nil }
      meaning = .name(name)
    } else {
      meaning = .either(argument)
    }
  }

  /// In the one form that Xenstore and xl have: neither the sign that Swift's own initializer takes too, nor leading zeros.
  private static func number(_ text: some StringProtocol) -> UInt32? {
    UInt32(text).flatMap { "\($0)" == text ? $0 : nil }
  }

  /// What it is called in messages: without the prefix.
  package var plain: String {
    switch meaning {
    case .number(let number): "\(number)"
    case .name(let name), .either(let name): name
    }
  }

  /// The one that is meant; nil when there is none.
  package func find(in domains: [Domain]) throws(Ambiguous) -> Domain? {
    let numbered: Domain? =
      switch meaning {
      case .number(let number): domains.first { $0.number == number }
      case .name: nil
      case .either(let word): Self.number(word).flatMap { number in domains.first { $0.number == number } }
      }
    let named: [Domain] =
      switch meaning {
      case .number: []
      case .name(let name), .either(let name): domains.filter { $0.name == name }
      }
    if let numbered {
      if let other = named.first(where: { $0 != numbered }) {
        throw Ambiguous(
          message:
            "'\(plain)' is the number of a domain, and the name of domain \(other.number); use id:\(plain) or name:\(plain)"
        )
      }
      return numbered
    }
    guard named.count <= 1 else {
      throw Ambiguous(
        message:
          "\(named.count) domains are called '\(plain)': use \(named.map { "id:\($0.number)" }.joined(separator: " or "))"
      )
    }
    return named.first
  }
}

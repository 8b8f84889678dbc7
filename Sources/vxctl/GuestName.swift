import ArgumentParser
import ControlAPI
import Xen

/// A guest as operators name it. One rule everywhere: `id:7` is a domain number and `name:web1` a name, whatever guests there are. A plain
/// word is a number if a domain has it, as with xl, and a name otherwise; a word that is the number of one domain and the name of another
/// is refused, because a command for one tenant's guest must not reach another's.
struct GuestName: ExpressibleByArgument, Equatable {
  enum Meaning: Equatable {
    case number(UInt32)
    case name(String)
    case either(String)
  }

  /// A domain and its name, as vxd or Xenstore knows them.
  struct Domain: Equatable {
    var number: UInt32
    var name: String
  }

  /// Why a guest cannot be told.
  struct Ambiguous: Error, Equatable { var message: String }

  let text: String
  let meaning: Meaning

  init?(argument: String) {
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

  /// Without the sign that Swift's own initializer takes too.
  private static func number(_ text: some StringProtocol) -> UInt32? {
    text.utf8.allSatisfy { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains($0) } ? UInt32(text) : nil
  }

  /// What it is called in messages: without the prefix.
  var plain: String {
    switch meaning {
    case .number(let number): "\(number)"
    case .name(let name), .either(let name): name
    }
  }

  /// The one that is meant; nil when there is none.
  func find(in domains: [Domain]) throws(Ambiguous) -> Domain? {
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

  // MARK: Of the daemon

  /// A guest as the daemon knows it.
  struct Known {
    /// What the daemon's methods take.
    var parameter: String
    /// Of its events; nil for a guest that the daemon does not know, about which it says so itself.
    var domain: Int64?
  }

  /// Finds the guest among the daemon's.
  ///
  /// The daemon looks for a name first and for a number then. So a number is safe where no other guest has it as its name, and a name where
  /// no other guest has it.
  func known(to client: ControlClient) throws(ControlClient.Failure) -> Known {
    let list = try client.call("guest.list").arrayValue ?? []
    let domains = list.compactMap { guest -> Domain? in
      guard let number = guest["domain"]?.integerValue.flatMap({ UInt32(exactly: $0) }),
        let name = guest["name"]?.stringValue
      else { return nil }
      return Domain(number: number, name: name)
    }
    do throws(Ambiguous) {
      guard let found = try find(in: domains) else { return Known(parameter: plain, domain: nil) }
      let domain = Int64(found.number)
      if !domains.contains(where: { $0.name == "\(found.number)" && $0 != found }) {
        return Known(parameter: "\(found.number)", domain: domain)
      }
      guard domains.count(where: { $0.name == found.name }) == 1 else {
        throw Ambiguous(
          message: "vxd cannot tell domain \(found.number) from the guest called '\(found.number)': rename one of them")
      }
      return Known(parameter: found.name, domain: domain)
    } catch {
      throw .refused(Self.fault(error))
    }
  }

  private static func fault(_ error: Ambiguous) -> ControlFault {
    ControlFault(code: -32602, message: error.message, data: ["field": "params.guest"])
  }

  // MARK: Of the toolstack

  /// The domain in Xenstore.
  func domain(in store: XenStore) throws(ToolstackDevice.Fault) -> DomainID {
    let numbers = (store.list("/local/domain") ?? []).compactMap { DomainID($0) }
    let domains = numbers.map { Domain(number: UInt32($0), name: store.read("/local/domain/\($0)/name") ?? "") }
    do throws(Ambiguous) {
      guard let found = try find(in: domains), let number = DomainID(exactly: found.number) else {
        throw Ambiguous(message: "no domain '\(plain)'")
      }
      return number
    } catch {
      throw ToolstackDevice.Fault(error.message, remedy: "'xl list' shows names and numbers")
    }
  }
}

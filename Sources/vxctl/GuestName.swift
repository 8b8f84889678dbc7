import ControlAPI
import Xen

extension GuestName: CommandValue {
  // MARK: Of the daemon

  /// A guest as the daemon knows it.
  struct Known {
    /// What the daemon's methods take.
    var parameter: String
    /// Of its events; nil for a guest that the daemon does not know, about which it says so itself.
    var domain: Int64?
  }

  /// Finds the guest among the daemon's.
  func known(to client: ControlClient) throws(ControlClient.Failure) -> Known {
    let list = try client.call("guest.list").arrayValue ?? []
    let domains = list.compactMap { guest -> Domain? in
      guard let number = guest["domain"]?.integerValue.flatMap({ UInt32(exactly: $0) }),
        let name = guest["name"]?.stringValue
      else { return nil }
      return Domain(number: number, name: name)
    }
    do throws(Ambiguous) {
      guard let found = try find(in: domains) else { return Known(parameter: text, domain: nil) }
      return Known(parameter: "id:\(found.number)", domain: Int64(found.number))
    } catch {
      throw .refused(Self.fault(error))
    }
  }

  private static func fault(_ error: Ambiguous) -> ControlFault {
    ControlFault(code: -32602, message: error.message, data: ["field": "params.guest"])
  }

  // MARK: Of the toolstack

  /// The domain in Xenstore.
  func domain(in xenstore: XenStore) throws(ToolstackDevice.Fault) -> DomainID {
    let numbers = (xenstore.list("/local/domain") ?? []).compactMap { DomainID($0) }
    let domains = numbers.map { Domain(number: UInt32($0), name: xenstore.read("/local/domain/\($0)/name") ?? "") }
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

package import Xen

/// Names one device of the domain: where it comes from, its guest, its number there.
package struct DeviceKey: Hashable, Sendable {
  package enum Kind: Hashable, Sendable {
    /// libxl's kind of its own for virtio disks.
    case disk
    /// libxl's kind for virtio devices of any type.
    case generic
    /// No kind of Xenstore's: a spare disk of the profiles.
    case spare
    /// Nor these: devices of a type, by its name, that profiles declare.
    case declared(String)

    /// Those that are watched in Xenstore.
    static let watched: [Kind] = [.disk, .generic]

    /// Whether such devices have an entry in Xenstore.
    var isInXenstore: Bool { Self.watched.contains(self) }

    /// As Xenstore, files and clients of the control socket have it.
    package var rawValue: String {
      switch self {
      case .disk: "virtio_disk"
      case .generic: "virtio"
      case .spare: "spare"
      case .declared(let type): type
      }
    }

    package init?(rawValue: String) {
      switch rawValue {
      case "": return nil
      case Kind.disk.rawValue: self = .disk
      case Kind.generic.rawValue: self = .generic
      case Kind.spare.rawValue: self = .spare
      default: self = .declared(rawValue)
      }
    }
  }

  package var kind: Kind
  package var domain: DomainID
  package var device: UInt32

  package init(kind: Kind, domain: DomainID, device: UInt32) {
    self.kind = kind
    self.domain = domain
    self.device = device
  }

  /// The backend directory, relative to the own domain's.
  package var path: String { "backend/\(kind.rawValue)/\(domain)/\(device)" }
}

// What swift-argument-parser names of Foundation, for the build of vxctl for arm64 (see arm64), where there is none. It is used for an error's
// description, and by --experimental-dump-help, which prints nothing then.

public protocol LocalizedError: Error {
  var errorDescription: String? { get }
}

public struct Data {
  public init() {}
}

extension String {
  public enum Encoding {
    case utf8
  }

  public init?(data: Data, encoding: String.Encoding) { return nil }
}

public final class JSONEncoder {
  public struct OutputFormatting: OptionSet, Sendable {
    public let rawValue: UInt
    public init(rawValue: UInt) { self.rawValue = rawValue }
    public static let prettyPrinted = OutputFormatting(rawValue: 1)
    public static let sortedKeys = OutputFormatting(rawValue: 2)
  }

  public var outputFormatting: OutputFormatting = []
  public init() {}
  public func encode<Value: Encodable>(_ value: Value) throws -> Data { Data() }
}
